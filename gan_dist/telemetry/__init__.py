"""What a person sees of a run while it trains: TensorBoard, metrics.jsonl, the console.

A tag is named where its value is made: training/update.py (STATS), training/statistics.py, training/evaluator.py and,
for pictures, gallery.py. telemetry.py writes them all.
"""
