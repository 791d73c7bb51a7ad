"""Show: the verdict in words, the table of differences, the figures, and the page of them all. The words need nothing;
the page and the figures need `pip install "neuroweave[report]"`."""
