"""The demo model: its weights (model/), corpus, training and evaluation. Serving it needs only the weights."""
