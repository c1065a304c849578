"""The demonstration: three hosts on one machine, a web server's live connections, and their move.

`scene` plays it from beginning to end; `network` is the stage, `web` the servers, `traffic` the clients, `owner` who
takes the connections on their new host, `move` the migration, `timeline` the picture.
"""
