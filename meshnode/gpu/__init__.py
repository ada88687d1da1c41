"""Free GPU memory, from whichever source this host has."""
