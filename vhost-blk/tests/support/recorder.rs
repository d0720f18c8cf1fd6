//! A file in memory that records every write and barrier, and the states a crash may leave behind.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use vhost_blk::image::BlockFile;

use super::Random;

/// Bytes that reach the disk in one piece.
const SECTOR: u64 = 512;

/// What an engine asked of the file.
#[derive(Clone, Debug)]
pub enum Op {
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    /// A write that is durable by itself, together with the file's length.
    Durable {
        offset: u64,
        bytes: Vec<u8>,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Length(u64),
    Barrier,
}

/// The recording file.
pub struct Recorder {
    start: Vec<u8>,
    state: Mutex<(Vec<u8>, Vec<Op>)>,
    /// Which of the files that are recorded together was asked, in order.
    order: Arc<Mutex<Vec<usize>>>,
    number: usize,
}

impl Recorder {
    pub fn new(start: Vec<u8>) -> Self {
        Self {
            state: Mutex::new((start.clone(), Vec::new())),
            start,
            order: Arc::default(),
            number: 0,
        }
    }

    /// A second file, recorded together with this one.
    pub fn beside(&self, start: Vec<u8>) -> Self {
        Self {
            order: Arc::clone(&self.order),
            number: self.number + 1,
            ..Self::new(start)
        }
    }

    /// How many operations there were so far on all files that are recorded together.
    pub fn moment(&self) -> usize {
        self.order.lock().unwrap().len()
    }

    /// How many of the first `moment` operations were on this file.
    pub fn count_at(&self, moment: usize) -> usize {
        let order = self.order.lock().unwrap();
        order[..moment]
            .iter()
            .filter(|number| **number == self.number)
            .count()
    }

    /// How many operations there were so far.
    pub fn position(&self) -> usize {
        self.state.lock().unwrap().1.len()
    }

    pub fn log(&self) -> Vec<Op> {
        self.state.lock().unwrap().1.clone()
    }

    fn record(&self, op: Op) {
        let mut state = self.state.lock().unwrap();
        apply(&mut state.0, &op);
        state.1.push(op);
        self.order.lock().unwrap().push(self.number);
    }

    /// The file as another process finds it if this one dies after `count` operations.
    pub fn after_process_death(&self, count: usize) -> Vec<u8> {
        let mut bytes = self.start.clone();
        for op in &self.log()[..count] {
            apply(&mut bytes, op);
        }
        bytes
    }

    /// The file after the host died when `count` operations were issued: all before the last barrier is
    /// there; of what came after, each sector, and the length, stopped at a moment of its own.
    pub fn after_host_crash(&self, count: usize, random: &mut Random) -> Vec<u8> {
        let log = self.log();
        let synced = log[..count]
            .iter()
            .rposition(|op| matches!(op, Op::Barrier))
            .map_or(0, |at| at + 1);
        let durable = self.after_process_death(synced);
        let loose = &log[synced..count];
        let mut certain: BTreeMap<u64, usize> = BTreeMap::new();
        let mut certain_length = 0;
        for (index, op) in loose.iter().enumerate() {
            if let Op::Durable { offset, bytes } = op {
                certain_length = index + 1;
                for sector in offset / SECTOR..(offset + bytes.len() as u64).div_ceil(SECTOR) {
                    certain.insert(sector, index + 1);
                }
            }
        }
        let length_cut = certain_length.max(random.below(loose.len() as u64 + 1) as usize);
        let mut length = durable.clone();
        loose[..length_cut].iter().for_each(|op| apply(&mut length, op));
        let mut cuts: BTreeMap<u64, usize> = BTreeMap::new();
        let mut bytes = durable;
        // One kind of crash in four writes back all but what came last; the others are wild.
        let orderly = random.below(4) == 0;
        for (index, op) in loose.iter().enumerate() {
            let (offset, len) = match op {
                Op::Write { offset, bytes } | Op::Durable { offset, bytes } => (*offset, bytes.len() as u64),
                Op::Zero { offset, len } => (*offset, *len),
                _ => continue,
            };
            let mut at = offset;
            while at < offset + len {
                let end = ((at / SECTOR + 1) * SECTOR).min(offset + len);
                let cut = *cuts.entry(at / SECTOR).or_insert_with(|| {
                    let cut = if orderly {
                        length_cut
                    } else {
                        random.below(loose.len() as u64 + 1) as usize
                    };
                    cut.max(certain.get(&(at / SECTOR)).copied().unwrap_or(0))
                });
                if index < cut {
                    let part = match op {
                        Op::Write { bytes, .. } | Op::Durable { bytes, .. } => {
                            let from = (at - offset) as usize;
                            Op::Write {
                                offset: at,
                                bytes: bytes[from..from + (end - at) as usize].to_vec(),
                            }
                        }
                        _ => Op::Zero {
                            offset: at,
                            len: end - at,
                        },
                    };
                    apply(&mut bytes, &part);
                }
                at = end;
            }
        }
        set_length(&mut bytes, length.len());
        bytes
    }
}

fn apply(file: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write { offset, bytes } | Op::Durable { offset, bytes } => {
            let start = *offset as usize;
            if file.len() < start + bytes.len() {
                set_length(file, start + bytes.len());
            }
            file[start..start + bytes.len()].copy_from_slice(bytes);
        }
        Op::Zero { offset, len } => {
            let end = file.len();
            file[(*offset as usize).min(end)..((*offset + *len) as usize).min(end)].fill(0);
        }
        Op::Length(len) => set_length(file, *len as usize),
        Op::Barrier => {}
    }
}

/// As `Vec::resize`, which takes its time without optimisation.
fn set_length(file: &mut Vec<u8>, len: usize) {
    match len.checked_sub(file.len()) {
        Some(more) => file.extend_from_slice(&vec![0; more]),
        None => file.truncate(len),
    }
}

impl BlockFile for Recorder {
    fn size(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().0.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        let start = (offset as usize).min(state.0.len());
        let len = buf.len().min(state.0.len() - start);
        buf[..len].copy_from_slice(&state.0[start..start + len]);
        buf[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.record(Op::Write {
            offset,
            bytes: buf.to_vec(),
        });
        Ok(())
    }

    fn write_durably(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.record(Op::Durable {
            offset,
            bytes: buf.to_vec(),
        });
        Ok(())
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.record(Op::Zero { offset, len });
        Ok(())
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        if self.size()? < len {
            self.record(Op::Length(len));
        }
        Ok(())
    }

    fn secure_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.grow_to(offset + len)
    }

    fn cut_to(&self, len: u64) -> io::Result<()> {
        if self.size()? > len {
            self.record(Op::Length(len));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.record(Op::Barrier);
        Ok(())
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        Ok((0, std::ptr::from_ref(self) as u64))
    }
}
