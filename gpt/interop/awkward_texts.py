"""Texts on which tokenizers differ where they differ at all: white space, case, digits, scripts, and special tokens."""

AWKWARD_TEXTS = (
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces   and    more",
    "\n",
    "\n\n\nthree newlines",
    "line\r\nline\r\n",
    "\ttab\tand\t\ttabs",
    " \n \n ",
    "        eight spaces",
    "def f(x):\n    return x ** 2  # comment\n",
    "for i in range(10):\n\tprint(i)\n\n\n",
    "don't can't I'll we've they'd he's I'm",
    "DON'T CAN'T I'LL WE'VE",
    "it’s a ‘quoted’ “text”",
    "3.14159 1,000,000 1234567890 0x1F 1e-5",
    "2026-11-25T18:30:00Z",
    "١٢٣ ४५६ ⅷ ½",
    "a1b2c3 v2.0-rc1 i18n",
    "CamelCaseWord snake_case_word kebab-case-word",
    "!!!??? ... -- --- ==> <= >= != &&",
    "(nested [brackets {here}])",
    "https://example.com/path?query=1&other=2#part",
    "user@example.com",
    "C:\\Users\\name\\file.txt",
    "$100 €50 £20 ¥1000 50%",
    "naïve café résumé",
    "nai\u0308ve cafe\u0301",
    "Straße GROẞE ﬁne",
    "Zażółć gęślą jaźń",
    "Привет, мир! Съешь ещё",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界！這是測試。",
    "こんにちは世界、カタカナ",
    "안녕하세요 세계",
    "🙂🎉🔥",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",
    "x\u00a0y\u2003z\u3000w",
    "zero\u200bwidth\u200djoiner\ufeff",
    "\u0000\u0001\u001f\u007f",
    "\u2028\u2029\u0085",
    "<|endoftext|>",
    "<s>text</s> <unk> <pad> [CLS] [MASK]",
    "<|im_start|>user\nHello<|im_end|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ab" * 100,
    "",
    "a",
    " ",
    "\ufffd",
)
"""Texts of a few words each."""

UNSEEN_TEXT = (
    "The ferry left at a quarter past six, an hour late, with eleven passengers and a crate of lemons nobody had "
    "claimed. Marta counted the gulls on the railing (seven), then the lemons (about 140), and wrote both numbers in "
    'her notebook under the heading \'things that do not matter\'. "If x = 3 and y = -2.5," she read aloud, "then '
    'x * y is -7.5"; the captain, who had once taught algebra in Ljubljana, nodded without turning around. By the '
    "time the harbour lights went out, the notebook held 23 such headings and no answer to the only question that "
    "she had been asked before she left: why go back at all?\n"
)
"""Text that no model was trained on."""
