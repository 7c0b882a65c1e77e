"""What can be read off a kernel's machine code."""

import re

LINE = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);")
UNIFORM = re.compile(r"\bUR(\d+)\b")


def unset_uniform(code: str) -> list[str]:
    """Instructions that read a uniform register which none before them wrote, in a dump of Hopper's machine code. There are none, unless the
    assembler made a mistake: that of CUDA 12.8 computes descriptors of shared memory from such registers, where a kernel has matrix
    products of several swizzles."""
    written, found = set(), []
    for name, operands in LINE.findall(code):
        target, *sources = [operand.strip() for operand in operands.split(",")]
        uniform = name.startswith(("U", "S2UR", "R2UR", "CS2UR", "VOTEU"))
        into = UNIFORM.fullmatch(target) if uniform else None
        read = set()
        for operand in sources if into else (target, *sources):
            for number in map(int, UNIFORM.findall(operand)):
                if "gdesc[" in operand:  # A's descriptor, unless A is in registers, and B's
                    read.update(range(number + 2 if re.match(r"R\d", sources[0]) else number, number + 4))
                else:
                    read.update(range(number, number + 1 + ("desc[" in operand or (uniform and ".64" in name))))
        if read - written:
            found.append(f"{name} {operands}".strip())
        if into:
            written.update(range(int(into[1]), int(into[1]) + (2 if ".64" in name or "WIDE" in name else 1)))
    return found
