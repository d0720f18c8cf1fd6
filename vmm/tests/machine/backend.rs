//! A vhost-user back end that does no more than a device's life needs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const VERSION_1: u64 = 1 << 32;
/// Version 1, a reply.
const REPLY: u32 = 1 | 1 << 2;

/// Serves one front end to its end; `dies` as its rings are to stop, or obeys.
pub(crate) fn start(mut socket: UnixStream, dies: bool) {
    std::thread::spawn(move || while serve(&mut socket, dies).is_ok_and(|go_on| go_on) {});
}

/// Answers one request. False: dies.
fn serve(socket: &mut UnixStream, dies: bool) -> std::io::Result<bool> {
    // Descriptors that come along are closed by the kernel: nobody takes them.
    let mut header = [0; 12];
    socket.read_exact(&mut header)?;
    let [request, _, size] = [0, 4, 8].map(|at| u32::from_le_bytes(std::array::from_fn(|i| header[at + i])));
    let mut payload = vec![0; size as usize];
    socket.read_exact(&mut payload)?;
    let answer = match request {
        GET_FEATURES => VERSION_1.to_le_bytes(),
        GET_VRING_BASE if dies => return Ok(false),
        // Where it stands: at 0.
        GET_VRING_BASE => u64::from(payload[0]).to_le_bytes(),
        _ => return Ok(true),
    };
    socket.write_all(&[request, REPLY, 8].map(u32::to_le_bytes).concat())?;
    socket.write_all(&answer)?;
    Ok(true)
}
