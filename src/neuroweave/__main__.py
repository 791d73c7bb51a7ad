"""`python -m neuroweave` is `neuroweave`."""

from neuroweave.cli.main import main

main()
