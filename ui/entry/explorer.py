"""The script of the explorer's server, run for each session and each click."""

from ui.app import main

main()
