"""Programs that talk to an OpenAI-compatible server over HTTP and know nothing of its insides."""
