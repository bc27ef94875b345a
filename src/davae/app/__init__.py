"""Page of `davae app`: draw, reconstruct, enlarge, inspect and train in a browser.

Gradio is the extra `davae[app]`. `page.py`, `widgets.py` and the `*_tab.py` use it; the other modules run without it.
"""
