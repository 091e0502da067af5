"""Models for many users, over HTTP, as OpenAI's clients expect it."""
