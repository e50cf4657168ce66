"""The phases of an evaluation: responses are sampled or read, graded or judged, and made into figures and tables."""
