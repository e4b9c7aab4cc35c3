"""The sub-commands of `proclip`, a function and a file each: they read the arguments, call the library and print.

A command imports what it needs inside its body, because `proclip --help` must answer in a moment and `import torch` alone takes several
seconds.
"""
