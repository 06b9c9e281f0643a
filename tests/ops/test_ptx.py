"""The emulator of PTX itself: instruction by instruction, and that it sees what a GPU would not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import run
from ptx_machine import EmulationError, parse

HEAD = """
.version 8.0
.target sm_90
.extern .shared .align 16 .b8 global_smem[];
.visible .entry probe(
	.param .u64 probe_param_0,
	.param .u64 probe_param_1
)
.reqntid 64
{
	.reg .b32 	%r<99>;
	mov.u32 	%r0, %tid.x; // and where the two tensors are
	mov.u32 	%r50, %ctaid.x;
	ld.param.b64 	%rd1, [probe_param_0];
	ld.param.b64 	%rd2, [probe_param_1];
	mad.lo.s32 	%r51, %r50, 64, %r0;
	mad.wide.s32 	%rd3, %r51, 4, %rd1;
	mad.wide.s32 	%rd4, %r51, 4, %rd2;
	shl.b32 	%r52, %r0, 2;
	ld.global.b32 	%r1, [%rd3];
"""
TAIL = '\n\tst.global.b32 \t[%rd4], %r9;\n\tret;\n$L__func_end0:\n}\n\t.file\t1 "probe.py"\n'


def threads(body: str, given: torch.Tensor, *, programs: int = 1, shared: int = 1024) -> torch.Tensor:
    """(64 programs,) what each of 64 threads leaves in %r9, who finds an entry of ``given`` (of 4 bytes) in %r1."""
    found = torch.full((64 * programs,), -77, dtype=given.dtype)
    run(parse(HEAD + body + TAIL, shared), [given, found], (programs,))
    return found


def numbers(dtype: torch.dtype = torch.int32, count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.float32:
        return torch.randn(count, generator=generator)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(dtype)


def signed(x: torch.Tensor) -> torch.Tensor:
    """Numbers of 64 bits as those of 32 that their lowest bits are."""
    return (x + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r9, %r1, 2147483647;", lambda x: signed(x + 2**31 - 1)),
        ("mul.lo.s32 %r9, %r1, -7;", lambda x: signed(-7 * x)),
        ("mul.hi.s32 %r9, %r1, 1000;", lambda x: (1000 * x) >> 32),
        ("div.s32 %r9, %r1, -1000;", lambda x: torch.div(x, -1000, rounding_mode="trunc")),
        ("rem.s32 %r9, %r1, 1000;", lambda x: torch.fmod(x, 1000)),
        ("div.u32 %r9, %r1, 10;", lambda x: x % 2**32 // 10),
        ("shr.s32 %r9, %r1, 3;", lambda x: x >> 3),
        ("shr.u32 %r9, %r1, 3;", lambda x: x % 2**32 >> 3),
        ("shr.s32 %r9, %r1, 40;", lambda x: x >> 31),
        ("shl.b32 %r9, %r1, 32;", lambda x: 0 * x),
        ("bfe.u32 %r9, %r1, 5, 3;", lambda x: x >> 5 & 7),
        ("bfe.s32 %r9, %r1, 5, 3;", lambda x: ((x >> 5 & 7) ^ 4) - 4),
        ("prmt.b32 %r9, %r1, 0, 0x7701U;", lambda x: (x & 255) << 8 | x >> 8 & 255),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", lambda x: (x & 65535) << 16 | x >> 16 & 65535),
        ("{ .reg .b16 tmp; mov.b32 {tmp, %rs2}, %r1; } cvt.s32.s16 %r9, %rs2;", lambda x: x >> 16),
        ("cvt.s64.s32 %rd9, %r1; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", lambda x: x >> 31),
        ("setp.lt.s32 %p1, %r1, 0; selp.b32 %r9, 5, %r1, %p1;", lambda x: torch.where(x < 0, 5, x)),
        ("mov.b32 %r9, 3; setp.lt.u32 %p1, %r1, 9; not.pred %p2, %p1; @%p2 mov.b32 %r9, 4;", lambda x: 0 * x + 4),
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", lambda x: x[torch.arange(64) ^ 5]),
        ("shfl.sync.idx.b32 %r9, %r1, 7, 31, -1;", lambda x: x.view(2, 32)[:, 7:8].expand(2, 32).flatten()),
        ("shfl.sync.up.b32 %r9, %r1, 2, 0, -1;", lambda x: x.view(2, 32)[:, [0, 1, *range(30)]].flatten()),
        ("redux.sync.min.s32 %r9, %r1, -1;", lambda x: x.view(2, 32).amin(1, keepdim=True).expand(2, 32).flatten()),
    ],
)  # fmt: skip
def test_integers(code, expected):
    given = numbers()
    assert torch.equal(threads(code, given).long(), signed(expected(given.long())))


PAIR = "cvt.rn.bf16x2.f32 %r2, %r1, 0fBF800000;"  # the number above, -1 below


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("fma.rn.f32 %r9, %r1, %r1, 0fBF800000;", lambda x: (x.double() * x.double() - 1).float()),
        ("div.full.f32 %r9, %r1, 0f40400000;", lambda x: x / 3),
        ("ex2.approx.f32 %r9, %r1;", lambda x: torch.exp2(x.double()).float()),
        ("cvt.rmi.ftz.f32.f32 %r9, %r1;", torch.floor),
        ("cvt.rzi.s32.f32 %r2, %r1; cvt.rn.f32.s32 %r9, %r2;", torch.trunc),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r9, %rs1;", lambda x: x.bfloat16().float()),
        ("cvt.rn.bf16x2.f32 %r9, %r1, 0f00000000; and.b32 %r9, %r9, 0xFFFF0000;", lambda x: x.bfloat16().float()),
        ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r9, %rs1;", lambda x: x.half().float()),
        (f"{PAIR} setp.gt.bf16x2 %p1|%p2, %r2, 0; selp.f32 %r9, %r1, 0f00000000, %p2;", torch.relu),
        (f"{PAIR} mul.bf16x2 %r9, %r2, 0xC0000000; and.b32 %r9, %r9, 0xFFFF0000;", lambda x: -2 * x.bfloat16().float()),
        ("max.f32 %r9, %r1, 0f7FC00000;", lambda x: x),
        ("max.NaN.f32 %r9, %r1, 0f7FC00000;", lambda x: x + torch.nan),
        ("mul.ftz.f32 %r9, %r1, 0f00800000;", lambda x: torch.where(x.abs() < 1, x * 0, x * 2.0**-126)),
        ("cvt.rn.bf16.f32 %rs1, %r1; setp.lt.bf16 %p1, %rs1, 0x8000; selp.f32 %r9, 0f00000000, %r1, %p1;", torch.relu),
        ("setp.ltu.f32 %p1, %r1, 0f7FC00000; selp.f32 %r9, %r1, 0f00000000, %p1;", lambda x: x),
        ("setp.ne.f32 %p1, %r1, 0f7FC00000; selp.f32 %r9, %r1, 0f00000000, %p1;", lambda x: x * 0),
        ("cvt.f64.f32 %rd9, %r1; sub.f64 %rd9, %rd9, 0d3FF0000000000000; cvt.rn.f32.f64 %r9, %rd9;", lambda x: x - 1),
    ],
)  # fmt: skip
def test_floats(code, expected):
    given = numbers(torch.float32)
    torch.testing.assert_close(threads(code, given), expected(given), rtol=0, atol=0, equal_nan=True)


def test_threads_that_branch_apart_meet_again():
    """Each goes round as often as its number says, two programs side by side; then all of a warp are needed."""
    body = """
	mov.b32 %r9, 0;
	and.b32 %r2, %r0, 3;
	setp.eq.b32 %p1, %r2, 0;
	@%p1 bra $L__BB0_2;
$L__BB0_1:
	add.s32 %r9, %r9, %r1;
	add.s32 %r2, %r2, -1;
	setp.gt.s32 %p1, %r2, 0;
	@%p1 bra $L__BB0_1;
$L__BB0_2:
	shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;"""
    given = numbers(count=128)
    expected = signed(given.long() * (torch.arange(128) & 3))[torch.arange(128) ^ 1]
    assert torch.equal(threads(body, given, programs=2).long(), expected)


def test_shared_memory_is_the_programs_own():
    body = """
	st.shared.b32 [%r52], %r1;
	bar.sync 0;
	xor.b32 %r2, %r52, 252;
	ld.shared.b32 %r9, [global_smem+0];
	ld.shared.b32 %r9, [%r2];"""
    given = numbers(count=128)
    assert torch.equal(threads(body, given, programs=2), given.view(2, 64).flip(1).flatten())


def test_atomic_additions_of_all_threads():
    total = torch.zeros(64, dtype=torch.int32)
    given = numbers(count=128)
    run(parse(HEAD + "red.global.gpu.relaxed.add.s32 [%rd2+8], %r1; ret;\n}", 0), [given, total], (2,))
    assert total[2] == signed(given.long().sum())
    body = "atom.global.gpu.acq_rel.add.u32 %r9, [%rd2+-4], 1;"
    counters = torch.zeros(65, dtype=torch.int32)
    run(parse(HEAD + body + TAIL, 0), [given[:64], counters[1:]], (1,))
    assert counters.tolist() == [64, *range(64)]


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_a_product_of_a_warp(kind):
    """Operands laid out by stmatrix and ldmatrix; the transposed one is read across."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-9, 10, (n, 16), generator=generator).to(dtype) for n in (16, 8))
    if kind == "tf32":
        a, b = a[:, :8].contiguous(), b[:, :8].contiguous()
    memory = torch.cat([a.flatten(), b.flatten()]).view(torch.int32)
    given = torch.zeros(256, dtype=torch.int32)
    given[: len(memory)] = memory
    found = torch.zeros(2, 16, 8)
    rows = 32  # bytes of a row of A and of B, of either kind
    body = f"""
	mov.b32 %r8, 0;
	{"".join(f"ld.global.b32 %r9, [%rd3+{256 * i}]; st.shared.b32 [%r52+{256 * i}], %r9;" for i in range(2))}
	{"".join(f"ld.global.b32 %r9, [%rd3+{256 * i}]; st.shared.b32 [%r52+{256 * i}], %r9;" for i in range(2, 4))}
	bar.sync 0;
	and.b32 %r2, %r0, 15; and.b32 %r3, %r0, 16; mad.lo.s32 %r4, %r2, {rows}, %r3;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4];
	and.b32 %r2, %r0, 7; and.b32 %r3, %r0, 8; shl.b32 %r3, %r3, 1; mad.lo.s32 %r4, %r2, {rows}, %r3;
	ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r14, %r15}}, [%r4+512];
	mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
	mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}},
		{{%r14, %r15}}, {{%r20, %r21, %r22, %r23}};
	and.b32 %r2, %r0, 31; shr.u32 %r3, %r2, 2; and.b32 %r2, %r2, 3; shl.b32 %r2, %r2, 3; mad.lo.s32 %r4, %r3, 32, %r2;
	shr.u32 %r5, %r0, 5; mad.lo.s32 %r4, %r5, 512, %r4; cvt.u64.u32 %rd5, %r4; add.s64 %rd5, %rd5, %rd2;
	st.global.v2.b32 [%rd5+0], {{%r20, %r21}}; st.global.v2.b32 [%rd5+256], {{%r22, %r23}};
	ret;
}}"""
    run(parse(HEAD + body, 1024), [given, found], (1,))
    assert torch.equal(found, (a.float() @ b.float().T).expand(2, 16, 8))


def test_matrices_across_and_back():
    body = """
	st.shared.b32 [%r52], %r1;
	bar.sync 0;
	and.b32 %r2, %r0, 31; shl.b32 %r2, %r2, 4; and.b32 %r3, %r0, 32; shl.b32 %r3, %r3, 2; and.b32 %r2, %r2, 112;
	add.s32 %r2, %r2, %r3;
	ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r2];
	stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r4};
	ld.shared.b32 %r9, [%r52];"""
    given = numbers()
    expected = given.view(torch.int16).view(2, 8, 8).mT.contiguous().flatten().view(torch.int32)
    assert torch.equal(threads(body, given), expected)


def test_a_copy_arrives_when_it_is_waited_for():
    copy = """
	cp.async.ca.shared.global [ %r52 + 0 ], [ %rd3 + 0 ], 0x4, 4;
	cp.async.commit_group;
	setp.lt.u32 %p1, %r0, 8;
	selp.b32 %r2, 0, 4, %p1;
	add.s32 %r3, %r52, 256;
	cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, %r2;
	cp.async.commit_group;
	cp.async.wait_group %d;
	ld.shared.b32 %r9, [%r52%s];
	cp.async.wait_group 0;"""
    given = numbers()
    poison = signed(torch.tensor(0xA5A5A5A5))

    def found(left: int, offset: str) -> torch.Tensor:
        return threads(copy.replace("%d", str(left)).replace("%s]", offset + "]"), given)

    assert torch.equal(found(1, ""), given)
    assert (found(1, "+256") == poison).all()
    assert (found(2, "") == poison).all()
    assert torch.equal(found(0, "+256"), given * (torch.arange(64) >= 8))


FEW_LEAVE = "setp.lt.u32 %p1, %r0, 3; @%p1 bra $L__1; "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r9, [%rd3+4];", r"%r9, \[%rd3\+4\]': 1 threads access 4 bytes that are nobody's"),
        ("ld.global.b64 %rd9, [%rd2+4];", "access of 8 bytes is not aligned"),
        ("ld.shared.b32 %r9, [%r52+1024];", "64 threads access 4 bytes that are nobody's"),
        (FEW_LEAVE + "bar.sync 0;\n$L__1: mov.b32 %r9, 0;", "'bar.sync 0': some of the threads"),
        (FEW_LEAVE + "redux.sync.add.s32 %r9, %r1, -1;\n$L__1: bar.sync 0;", "'redux.*': some of the threads"),
        ("popc.b32 %r9, %r1;", "probe, 'popc.b32 %r9, %r1': this instruction is not emulated"),
        ("shfl.sync.bfly.b32 %r9, %r1, 1, 7199, -1;", "this form of it is not emulated"),
        ("cp.async.ca.shared.global [ %r52 + 0 ], [ %rd3 + 0 ], 0x4, 4; mov.b32 %r9, 0;", "copies that nobody has"),
        ("mov.b32 %r9, fog;", "'mov.b32 %r9, fog'"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_not_do_is_said(body, message):
    with pytest.raises(EmulationError, match=message):
        threads(body, numbers())


def test_registers_and_shared_memory_hold_garbage_at_first():
    poison = int(np.array([0xA5A5A5A5], np.uint32).view(np.int32)[0])
    assert (threads("ld.shared.b32 %r9, [%r52];", numbers()) == poison).all()
    assert (threads("add.s32 %r9, %r77, 1;", numbers()) == poison + 1).all()
