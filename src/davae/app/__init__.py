"""The page of `davae app`: draw, reconstruct, inspect and train in a browser. Gradio is the extra `davae[app]`.

Only `page.py`, `tabs.py` and `train_tab.py` know Gradio; what they call stands in the other modules and runs without it.
"""
