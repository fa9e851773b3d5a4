"""The word lists of the corpus, bilingual where both languages need the same thing; the words are in words.txt.

Every pair is (English, Chinese). Which words are for training and which are held out is decided in `source.py`.
"""

from .resources import pairs, word_list

VERBS = pairs("verbs")
NOUNS = pairs("nouns")
ADJECTIVES = pairs("adjectives")
CITIES = pairs("cities")
COUNTRIES = pairs("countries")
LANGUAGES = pairs("languages")
COLORS = pairs("colors")
FOODS = pairs("foods")
FIRST_NAMES = word_list("first_names")
LAST_NAMES = word_list("last_names")
SURNAMES_ZH = word_list("surnames zh")[0]
GIVEN_ZH = word_list("given names zh")[0]
CURRENCIES = word_list("currencies")
TICKERS = word_list("tickers")
