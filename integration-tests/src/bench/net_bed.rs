//! One device process with its TAP, driven by one thread; and the floor under the same load.

use super::net_driver::{Lane, Shape, wait};
use super::net_frames::Size;
use super::net_host::{self, BATCH, Host};
use crate::frontend_harness::{Options, Session, virtio};
use crate::process::Process;
use anyhow::{Context, Result, anyhow, ensure};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Entries of each ring.
pub(super) const RING: u16 = 256;
/// Frames between the generator and the guest: below the TAP's queue, so that none is dropped.
const MOST_SMALL: usize = 256;
const MOST_SUPER: usize = 16;
/// Without a frame for so long, those on their way were lost.
const LOST: Duration = Duration::from_millis(100);
/// How the device is driven.
pub(super) const TAP: &str = "bench0";
const FLOOR: &str = "floor0";
const MERGEABLE: u64 = 1 << 15;

/// What one turn measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    pub(super) frames: u64,
    pub(super) lost: u64,
    pub(super) time: Duration,
    /// CPU time of the process, or of the floor's loop.
    pub(super) cpu: Duration,
}

impl Turn {
    /// Frames a second.
    pub(super) fn rate(&self) -> f64 {
        self.frames as f64 / self.time.as_secs_f64()
    }

    /// Microseconds of CPU a frame.
    pub(super) fn cost(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.frames.max(1) as f64
    }
}

/// How the driver posts receive buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Posting {
    Large,
    Chains,
    Mergeable,
}

impl Posting {
    fn shape(self) -> Shape {
        match self {
            Self::Large => Shape::Whole(17 * 4096),
            Self::Chains => Shape::Chain(18 * 4096),
            Self::Mergeable => Shape::Whole(1536),
        }
    }
}

/// A running device.
pub(super) struct Bed {
    process: Process,
    _session: Session,
    receive: Vec<Lane>,
    transmit: Vec<Lane>,
    size: Size,
    posting: Posting,
    host: Host,
}

impl Bed {
    pub(super) fn start(
        binary: &Path,
        flags: &[String],
        size: Size,
        posting: Posting,
        pairs: u16,
    ) -> Result<Self> {
        net_host::make_tap(TAP, pairs)?;
        let mut command = Command::new(binary);
        command.args(["--fd=3", "--mac=02:00:00:00:00:02"]);
        command.arg(format!("--tap-name={TAP}"));
        command.arg(format!("--num-queues={}", 2 * pairs));
        command.args(flags);
        let (process, socket) = Process::start_with_socket(command)?;
        let unwanted = if posting == Posting::Mergeable {
            0
        } else {
            MERGEABLE
        };
        let options = Options {
            queues: 2 * pairs,
            ring_size: RING,
            features: !unwanted,
            memory: 1 << 30,
            ..Options::default()
        };
        let session = Session::start(socket, &options)
            .with_context(|| format!("stderr: {}", process.stderr().unwrap_or_default()))?;
        let ring_features = virtio::EVENT_IDX | virtio::INDIRECT_DESC;
        ensure!(
            session.features & ring_features == ring_features,
            "no ring features"
        );
        let bytes = size.to_host();
        let sending = match size {
            Size::Super => Shape::Chain(bytes.len() as u64),
            _ => Shape::Whole(bytes.len() as u64),
        };
        let (mut receive, mut transmit) = (Vec::new(), Vec::new());
        let mut slots = session.data_start();
        for (index, ring) in session.rings.iter().enumerate() {
            let incoming = index % 2 == 0;
            let shape = if incoming { posting.shape() } else { sending };
            let mut lane = Lane::new(&session.memory, ring, slots, shape, incoming)?;
            slots += Lane::footprint(RING, shape);
            for slot in 0..lane.size() {
                if incoming {
                    lane.offer(slot)?;
                } else {
                    lane.fill(slot, &bytes)?;
                }
            }
            lane.publish()?;
            if incoming {
                receive.push(lane)
            } else {
                transmit.push(lane)
            }
        }
        let flows = if pairs > 1 { 64 } else { 1 };
        let frames = (0..flows).map(|flow| size.to_guest(flow)).collect();
        let host = Host::new(TAP, frames, false)?;
        wait_carrier()?;
        Ok(Self {
            process,
            _session: session,
            receive,
            transmit,
            size,
            posting,
            host,
        })
    }

    /// Its process.
    pub(super) fn pid(&self) -> Pid {
        self.process.pid()
    }

    fn cpu(&self) -> Result<Duration> {
        Ok(clock_gettime(clock_getcpuclockid(self.process.pid())?)?.into())
    }

    fn say(&self, error: anyhow::Error) -> anyhow::Error {
        error.context(self.process.stderr().unwrap_or_default())
    }

    /// The guest sends as fast as the device takes frames, on all pairs.
    pub(super) fn send(&mut self, span: Duration) -> Result<Turn> {
        let (cpu, start) = (self.cpu()?, Instant::now());
        let mut frames = 0;
        for lane in &mut self.transmit {
            (0..lane.size()).try_for_each(|slot| lane.offer(slot))?;
            lane.publish()?;
        }
        loop {
            let over = start.elapsed() >= span;
            let mut idle = true;
            for lane in &mut self.transmit {
                while let Some(slot) = lane.take()? {
                    frames += 1;
                    idle = false;
                    if !over {
                        lane.offer(slot)?;
                    }
                }
                lane.publish()?;
            }
            let busy: Vec<&Lane> = self
                .transmit
                .iter()
                .filter(|lane| lane.outstanding() > 0)
                .collect();
            if busy.is_empty() {
                break;
            }
            // As a driver that reclaims late: not before three quarters are sent.
            let arm = |lane: &&Lane| lane.arm((lane.outstanding() - 1) * 3 / 4);
            if idle && !busy.iter().map(arm).collect::<Result<Vec<_>>>()?.contains(&true) {
                let woken = wait(&busy, Duration::from_secs(2))?;
                ensure!(woken, self.say(anyhow!("the device takes no more frames")));
            }
        }
        Ok(Turn {
            frames,
            lost: 0,
            time: start.elapsed(),
            cpu: self.cpu()? - cpu,
        })
    }

    /// The host sends as fast as the guest receives.
    pub(super) fn receive(&mut self, span: Duration) -> Result<Turn> {
        let most = most_under_way(self.size);
        let (cpu, start) = (self.cpu()?, Instant::now());
        let (mut frames, mut under_way, mut lost, mut parts) = (0, 0, 0, vec![0; self.receive.len()]);
        loop {
            let over = start.elapsed() >= span;
            if over && under_way == 0 {
                break;
            }
            let sent = if over {
                0
            } else {
                self.host.send(most - under_way)?
            };
            under_way += sent;
            let mut came = 0;
            for (lane, parts) in self.receive.iter_mut().zip(&mut parts) {
                while let Some(slot) = lane.take()? {
                    if *parts == 0 {
                        *parts = match self.posting {
                            Posting::Mergeable => lane.buffers(slot)?,
                            _ => 1,
                        };
                        came += 1;
                    }
                    *parts -= 1;
                    lane.offer(slot)?;
                }
                lane.publish()?;
            }
            frames += came as u64;
            // More than were on their way: some that counted as lost were late.
            under_way = under_way.saturating_sub(came);
            if came == 0 && sent == 0 {
                let lanes: Vec<&Lane> = self.receive.iter().collect();
                let ready = lanes.iter().map(|lane| lane.arm(0)).collect::<Result<Vec<_>>>()?;
                if !ready.contains(&true) && !wait(&lanes, LOST)? {
                    lost += std::mem::take(&mut under_way) as u64;
                }
            }
        }
        Ok(Turn {
            frames,
            lost,
            time: start.elapsed(),
            cpu: self.cpu()? - cpu,
        })
    }

    /// Frames one after the other: host, guest, host; seconds each, the driver asleep or spinning.
    pub(super) fn round_trips(&mut self, count: u32, spin: bool) -> Result<Duration> {
        let mut host = Host::new(TAP, vec![self.size.to_guest(0)], true)?.nonblocking()?;
        let start = Instant::now();
        for trip in 0..count {
            ensure!(host.send(1)? == 1, "the frame was not sent");
            let lane = &mut self.receive[0];
            let slot = loop {
                if let Some(slot) = lane.take()? {
                    break slot;
                }
                if !spin && !lane.arm(0)? {
                    let woken = wait(&[&*lane], Duration::from_secs(2))?;
                    ensure!(woken, "the frame did not come");
                }
            };
            lane.offer(slot)?;
            lane.publish()?;
            let lane = &mut self.transmit[0];
            while lane.take()?.is_some() {}
            // The frame arrives before the device shows that it has sent it: not the same slot again.
            lane.offer((trip % u32::from(RING)) as u16)?;
            lane.publish()?;
            host.receive(spin)?;
        }
        Ok(start.elapsed() / count)
    }

    /// Ends the process and removes the TAP.
    pub(super) fn stop(self) -> Result<()> {
        drop(self);
        net_host::remove_tap(TAP)
    }
}

fn most_under_way(size: Size) -> usize {
    if size == Size::Super {
        MOST_SUPER
    } else {
        MOST_SMALL
    }
}

fn wait_carrier() -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    let path = format!("/sys/class/net/{TAP}/carrier");
    let running = || {
        nix::ifaddrs::getifaddrs().is_ok_and(|mut all| {
            all.any(|one| {
                one.interface_name == TAP && one.flags.contains(nix::net::if_::InterfaceFlags::IFF_RUNNING)
            })
        })
    };
    while !running() {
        ensure!(Instant::now() < end, "{path}: no carrier");
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Bare loops over a TAP of their own.
pub(super) struct Floor {
    tap: File,
    size: Size,
}

impl Floor {
    pub(super) fn start(size: Size) -> Result<Self> {
        net_host::make_tap(FLOOR, 1)?;
        Ok(Self {
            tap: net_host::open_tap(FLOOR)?,
            size,
        })
    }

    /// One `writev` a frame, from as many buffers as a driver has.
    pub(super) fn send(&mut self, span: Duration) -> Result<Turn> {
        let buffers = vec![self.size.to_host(); RING.into()];
        let (cpu, start) = (thread_cpu()?, Instant::now());
        let mut frames = 0;
        while start.elapsed() < span {
            for bytes in &buffers {
                frames += u64::from(net_host::write_frame(&mut self.tap, bytes)?);
            }
        }
        Ok(Turn {
            frames,
            lost: 0,
            time: start.elapsed(),
            cpu: thread_cpu()? - cpu,
        })
    }

    /// Batches of frames through io_uring, each in one call.
    pub(super) fn send_by_ring(&mut self, span: Duration) -> Result<Turn> {
        let mut ring = net_host::RingFrames::new(&self.size.to_host())?;
        let (cpu, start) = (thread_cpu()?, Instant::now());
        let mut frames = 0;
        while start.elapsed() < span {
            frames += ring.write(&self.tap)? as u64;
        }
        Ok(Turn {
            frames,
            lost: 0,
            time: start.elapsed(),
            cpu: thread_cpu()? - cpu,
        })
    }

    /// One `readv` a frame, under the generator's load.
    pub(super) fn receive(&mut self, span: Duration) -> Result<Turn> {
        let most = most_under_way(self.size);
        let (received, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let mut host = Host::new(FLOOR, vec![self.size.to_guest(0)], false)?;
        let tap = &mut self.tap;
        thread::scope(|scope| {
            let reader = scope.spawn(|| -> Result<Duration> {
                let mut buffer = vec![0; 17 * 4096];
                let cpu = thread_cpu()?;
                while !stop.load(Ordering::Relaxed) {
                    let count = net_host::read_frames(tap, &mut buffer, false, BATCH)?;
                    received.fetch_add(count, Ordering::Relaxed);
                }
                Ok(thread_cpu()? - cpu)
            });
            let (start, mut sent) = (Instant::now(), 0);
            let result = (|| -> Result<()> {
                while start.elapsed() < span {
                    let under_way = sent - received.load(Ordering::Relaxed);
                    let count = host.send(most - under_way)?;
                    sent += count;
                    if count == 0 {
                        thread::yield_now();
                    }
                }
                Ok(())
            })();
            let (frames, time) = (received.load(Ordering::Relaxed) as u64, start.elapsed());
            stop.store(true, Ordering::Relaxed);
            let cpu = reader
                .join()
                .map_err(|_| anyhow!("the floor's reader panicked"))??;
            result?;
            Ok(Turn {
                frames,
                lost: 0,
                time,
                cpu,
            })
        })
    }

    /// Frames one after the other: socket, TAP's reader, which writes one back, socket.
    pub(super) fn round_trips(&mut self, count: u32, spin: bool) -> Result<Duration> {
        let mut host = Host::new(FLOOR, vec![self.size.to_guest(0)], true)?.nonblocking()?;
        let bytes = self.size.to_host();
        let tap = &mut self.tap;
        thread::scope(|scope| {
            let echo = scope.spawn(move || -> Result<()> {
                let mut buffer = vec![0; 17 * 4096];
                for _ in 0..count {
                    while net_host::read_frames(tap, &mut buffer, spin, 1)? == 0 {}
                    ensure!(net_host::write_frame(tap, &bytes)?, "the TAP is full");
                }
                Ok(())
            });
            let start = Instant::now();
            for _ in 0..count {
                ensure!(host.send(1)? == 1, "the frame was not sent");
                host.receive(spin)?;
            }
            let time = start.elapsed() / count;
            echo.join().map_err(|_| anyhow!("the floor's echo panicked"))??;
            Ok(time)
        })
    }

    /// Removes its TAP.
    pub(super) fn stop(self) -> Result<()> {
        drop(self);
        net_host::remove_tap(FLOOR)
    }
}

fn thread_cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
