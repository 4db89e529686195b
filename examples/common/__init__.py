"""The base of the scripts: settings, command lines, devices, models and files. It imports no other folder."""
