"""Parts that several families share. Modules are imported by their own names; nothing is re-exported."""
