"""The local page: its server, who may talk to it, the files it reads, and the session that registers."""
