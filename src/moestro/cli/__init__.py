"""The command `moestro`: one verb per file, each a thin wrapper of one Python function.

Help texts are read from configs and option classes, so they load no torch; what a verb needs is imported when it runs.
"""
