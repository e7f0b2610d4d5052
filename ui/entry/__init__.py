"""What the server runs. It lies apart from `ui/pages`: a folder of that name beside it, Streamlit would take for its own."""
