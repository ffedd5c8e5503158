"""One module a command of the ``grape-ray`` program, imported only when that command is called."""
