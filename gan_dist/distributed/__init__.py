"""The world of ranks: how they meet, wait for one another, and tell which was lost."""
