"""Real training runs with AdamW, to measure predictions against."""
