"""What the artifacts say: reports for people, and the same as data."""
