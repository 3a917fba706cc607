"""What a person sees of a run while it trains: TensorBoard, metrics.jsonl, the console."""
