"""bnfctl: LLM alignment with the Bidirectional Negative Feedback loss, as simple as fine-tuning."""

__version__ = "0.1.0"
