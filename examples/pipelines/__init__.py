"""The work of the scripts. A script reads its command line, then imports its pipeline, and torch with it."""
