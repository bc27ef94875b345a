"""`python -m davae` is the same as `davae`."""

from davae.cli import main

main()
