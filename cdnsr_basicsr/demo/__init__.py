"""A local page on which routed networks are tried, what `basicsr demo` opens; page.py alone needs Gradio."""
