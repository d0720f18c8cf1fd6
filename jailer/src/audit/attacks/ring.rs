//! io_uring: a filter sees the ring made and entered, never what it is asked to do.

use super::{Attempt, Outcome, address, below, call, try_call};
use libc as l;

pub(super) const ALL: &[(&str, Attempt)] = &[
    ("io-uring", |_| setup(&mut [0; 30]).map(drop)),
    ("io-uring-open", |o| {
        submit(&Entry {
            opcode: 18,
            fd: l::AT_FDCWD,
            address: address(&below(o, "secret")),
            ..Entry::default()
        })
    }),
    ("io-uring-statx", |o| {
        let mut out = [0u64; 32];
        // The result's address is where `offset` is.
        submit(&Entry {
            opcode: 21,
            fd: l::AT_FDCWD,
            address: address(&below(o, "secret")),
            length: l::STATX_SIZE,
            offset: out.as_mut_ptr() as u64,
        })
    }),
    ("io-uring-unlink", |o| {
        submit(&Entry {
            opcode: 36,
            fd: l::AT_FDCWD,
            address: address(&below(o, "secret")),
            ..Entry::default()
        })
    }),
    ("io-uring-mkdir", |o| {
        submit(&Entry {
            opcode: 37,
            fd: l::AT_FDCWD,
            address: address(&below(o, "new")),
            length: 0o700,
            ..Entry::default()
        })
    }),
    // Both take the second path where `offset` is.
    ("io-uring-rename", |o| {
        let to = below(o, "new");
        submit(&Entry {
            opcode: 35,
            fd: l::AT_FDCWD,
            address: address(&below(o, "secret")),
            length: l::AT_FDCWD as u32,
            offset: address(&to) as u64,
        })
    }),
    ("io-uring-link", |o| {
        let to = below(o, "new");
        submit(&Entry {
            opcode: 38,
            fd: l::AT_FDCWD,
            address: address(&below(o, "secret")),
            offset: address(&to) as u64,
            ..Entry::default()
        })
    }),
    ("io-uring-socket", |_| {
        // fd is the family, `offset` the type.
        submit(&Entry {
            opcode: 45,
            fd: l::AF_INET,
            offset: l::SOCK_STREAM as u64,
            ..Entry::default()
        })
    }),
];

/// What of `struct io_uring_sqe` attacks need.
#[derive(Default)]
struct Entry {
    opcode: u8,
    fd: i32,
    offset: u64,
    address: usize,
    length: u32,
}

/// `struct io_uring_params` as words: sq_off at 10, cq_off at 20.
type Params = [u32; 30];

fn setup(params: &mut Params) -> Result<usize, i32> {
    call(l::SYS_io_uring_setup, [1, params.as_mut_ptr() as usize])
}

fn map(ring: usize, offset: usize) -> Result<usize, i32> {
    let access = (l::PROT_READ | l::PROT_WRITE) as usize;
    let shared = (l::MAP_SHARED | l::MAP_POPULATE) as usize;
    call(l::SYS_mmap, [0, 4096, access, shared, ring, offset])
}

/// One request, waited for.
fn submit(request: &Entry) -> Outcome {
    let mut params = [0; 30];
    let ring = setup(&mut params)?;
    // IORING_FEAT_SINGLE_MMAP is older than OPENAT is: both rings are in the first map.
    let rings = map(ring, 0)?;
    let entry = map(ring, 0x1000_0000)?;
    // struct io_uring_sqe: opcode, fd at 4, off at 8, addr at 16, len at 24.
    put(entry, request.opcode);
    put(entry + 4, request.fd);
    put(entry + 8, request.offset);
    put(entry + 16, request.address);
    put(entry + 24, request.length);
    // sq_off: head, tail, ring_mask, ring_entries, flags, dropped, array.
    put(rings + params[16] as usize, 0u32);
    put(rings + params[11] as usize, 1u32);
    // IORING_ENTER_GETEVENTS: submit one, wait for one.
    try_call(l::SYS_io_uring_enter, [ring, 1, 1, 1, 0, 0])?;
    // cq_off: head, tail, ring_mask, ring_entries, overflow, cqes; struct io_uring_cqe:
    // user_data, then the result.
    let result = (rings + params[25] as usize + 8) as *const i32;
    // SAFETY: within the rings' map, at the kernel's own offset.
    let result = unsafe { result.read_volatile() };
    if result < 0 { Err(-result) } else { Ok(()) }
}

fn put<T>(place: usize, value: T) {
    // SAFETY: `submit` names places within its maps, which are a page each, at the alignment that
    // the kernel chose for such a value.
    unsafe { (place as *mut T).write_volatile(value) }
}
