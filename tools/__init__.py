"""Tool calling: what a call looks like in each family's prompts and replies. Knows text, not HTTP and not tensors."""
