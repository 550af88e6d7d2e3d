"""Parts of ``bench_ssl.py``: protocols, arms, published figures, tables."""
