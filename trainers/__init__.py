"""Training, evaluation and the command line of ProCLIP. Importing this package loads no torch: `proclip --help` goes through here."""
