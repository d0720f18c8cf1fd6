//! What the host's file costs without a device: a bare loop of one call a request, in as many threads as
//! there are queues. No disk process that copies can be cheaper.

use super::blk_driver::{Operation, Pattern, Work};
use anyhow::{Result, anyhow};
use nix::time::{ClockId, clock_gettime};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Rate of all threads, and CPU time of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Floor {
    /// Requests a second.
    pub(super) rate: f64,
    /// Microseconds.
    pub(super) cost: f64,
}

/// Does `work` on the raw image at `path` with plain calls for `time`.
pub(super) fn measure(path: &Path, work: &Work, threads: u16, time: Duration) -> Result<Floor> {
    let file = File::options().read(true).write(true).open(path)?;
    let start = Instant::now();
    let sums = thread::scope(|scope| {
        let loops: Vec<_> = (0..u64::from(threads))
            .map(|seed| (seed, &file))
            .map(|(seed, file)| scope.spawn(move || one_thread(file, work, seed, time)))
            .collect();
        loops
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a loop panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let requests: u64 = sums.iter().map(|(requests, _)| requests).sum();
    let cpu: Duration = sums.iter().map(|(_, cpu)| *cpu).sum();
    Ok(Floor {
        rate: requests as f64 / start.elapsed().as_secs_f64(),
        cost: cpu.as_secs_f64() * 1e6 / requests.max(1) as f64,
    })
}

fn one_thread(file: &File, work: &Work, seed: u64, time: Duration) -> Result<(u64, Duration)> {
    let cpu = || -> Result<Duration> { Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into()) };
    // As many buffers as the driver uses in turn.
    let mut buffers = vec![vec![0x5A_u8; usize::try_from(work.block)?]; usize::from(work.depth)];
    let (start, before) = (Instant::now(), cpu()?);
    let (mut count, mut random) = (0, seed.wrapping_mul(977) | 1);
    while start.elapsed() < time {
        for buffer in &mut buffers {
            let blocks = work.span / work.block;
            let block = match work.pattern {
                Pattern::Random | Pattern::Clusters => {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random % blocks
                }
                Pattern::Sequential => count % blocks,
            };
            match work.operation {
                Operation::Read => file.read_exact_at(buffer, block * work.block)?,
                Operation::Write => file.write_all_at(buffer, block * work.block)?,
            }
            count += 1;
        }
    }
    Ok((count, cpu()? - before))
}
