"""The synthetic corpus of the demo model: dialogues written by templates and random values, in English and Chinese."""
