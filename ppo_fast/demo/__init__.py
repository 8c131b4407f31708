"""Real and made-up language models, data and rewards to try the library on, all from PyPI packages."""
