"""Where the runs of a study are done: in this process, or in several on this machine."""
