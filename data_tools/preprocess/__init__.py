"""Pipeline of ``preprocess_data``, lower layers first.

``input``: files to blocks of lines or rows; ``selection``: which documents; ``encoding``: texts to
tokens; ``job``: the loop, its output and resumption; ``arrangement``: shuffling and duplicates;
``array``: many jobs.
"""
