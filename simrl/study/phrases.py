"""Phrases and formats of assistants in messages of people, as regular expressions."""

import re

# Phrases by which an assistant speaks to people. They open and close replies of all families.
PHRASES = re.compile(
    r"""
    \bas\san?\s(?:AI|artificial\sintelligence|(?:large\s)?language\smodel)\b
    | \b(?:certainly|absolutely|of\scourse|sure)[!,.]?\s(?:here['’]?s?|I['’]d\sbe|I['’]ll|I\scan)\b
    | \bI\s(?:do\snot|don['’]t)\shave\s(?:personal|feelings|access\sto)
    | \bI(?:['’]d\sbe|['’]m|\swould\sbe)\s(?:happy|glad)\sto\s(?:help|assist)
    | \bhow\s(?:can|may)\sI\s(?:help|assist)\syou
    | \blet\sme\sknow\sif\s(?:you|there)\b
    | \bhere(?:['’]s|\sis|\sare)\s(?:an?|the|some|your)\s
      (?:revised|updated|possible|polished|refined|draft|sample|version|few|list|outline)\b
    | \bI\scan(?:not|['’]t)\s(?:assist|fulfil)
    | \bmy\s(?:training\sdata|knowledge\scut-?off)
    """,
    re.IGNORECASE | re.VERBOSE,
)
MARKS = re.compile(
    r"""
    \b(?:delv\w+|tapestry|testament\sto|multifaceted|intricate\w*|nuanced?|seamless\w*|foster\w*|underscor\w+|pivotal
    | moreover|furthermore|leverag\w+|showcas\w+|captivat\w+|embark\w*|resonat\w+|meticulous\w*|invaluable|realm
    | in\sconclusion|it['’]s\simportant\sto\snote|harness\w*|elevat\w+|unwavering|transformative)\b
    | ^\#{1,4}\s | \*\*[^*\n]+\*\* | ^\s*[-*•]\s\*\* | —
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
