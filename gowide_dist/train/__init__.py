"""Training: the loop, its students and objectives, and what a stage writes."""
