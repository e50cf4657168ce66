"""OpenAI-compatible endpoints: many requests at a time, several servers, retries, and answers that survive a crash."""
