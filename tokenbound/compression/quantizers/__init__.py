"""How values are chosen that code short and cost little loss; `methods` says when, `codecs` how they are written."""
