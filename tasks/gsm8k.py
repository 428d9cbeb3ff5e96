"""GSM8K stub for now."""
def score(c, e):
    def final(s):
        return s.split("#### ")[-1].strip() if "#### " in s else None
    return final(c) is not None and final(c)==final(e.answer)
