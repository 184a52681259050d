"""The right value of each kind of file that people report trouble with."""
