"""What every error has in common whose message is written for the person at the command line."""


class UserError(Exception):
    """Something that the user can mend: the message, one line, says what was given, what is allowed and what to do.

    The commands print it and exit with code 1; any other exception is a fault of the program and keeps its traceback.
    """
