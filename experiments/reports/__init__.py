"""Output for people: pictures, tables, statistics and the files of a registered case."""
