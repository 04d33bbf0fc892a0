"""What runs leave for people: pictures, tables, statistics and the files of a case."""
