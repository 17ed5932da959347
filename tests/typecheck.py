"""The type checker of the test suite: an int will do where a float is asked for, as in Python itself."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
