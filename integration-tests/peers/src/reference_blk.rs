//! A block back end built wholly on the crate `vhost-user-backend`: a second opinion on our
//! vmm's front end and on the tests' own.
//!
//! `reference-blk SOCKET RAW-FILE` serves one connection. It knows reads, writes, flushes and
//! GET_ID, one request at a time, and no in-flight region (the crate refuses it).

use anyhow::{Context, Result};
use std::{
    env,
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::{
    bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
    virtio_blk::{
        VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    },
    virtio_config::VIRTIO_F_VERSION_1,
};
use virtio_queue::{QueueOwnedT, Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const SECTOR: u64 = 512;
const QUEUES: usize = 4;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Longest request that is served.
const MAX_DATA: usize = 1 << 20;

struct Disk {
    file: File,
    memory: Memory,
    event_idx: bool,
}

impl Disk {
    /// Serves what queue `vring` holds now.
    fn serve(&self, vring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.memory();
        loop {
            let next = vring
                .get_mut()
                .get_queue_mut()
                .iter(memory.clone())
                .map_err(io::Error::other)?
                .next();
            let Some(chain) = next else {
                return Ok(());
            };
            let head = chain.head_index();
            let mut reader = chain.clone().reader(&memory).map_err(io::Error::other)?;
            let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
            let room = writer.available_bytes();
            let written = match room.checked_sub(1) {
                None => 0,
                Some(data) => {
                    let mut status = writer.split_at(data).map_err(io::Error::other)?;
                    let code = self.request(&mut reader, &mut writer);
                    status.write_all(&[u8::try_from(code).unwrap_or(u8::MAX)])?;
                    room as u32
                }
            };
            vring.add_used(head, written).map_err(io::Error::other)?;
            if vring.needs_notification().map_err(io::Error::other)? {
                vring.signal_used_queue()?;
            }
        }
    }

    fn request(&self, reader: &mut Reader<'_>, writer: &mut Writer<'_>) -> u32 {
        let (Ok(kind), Ok(_), Ok(sector)) = (
            reader.read_obj::<u32>(),
            reader.read_obj::<u32>(),
            reader.read_obj::<u64>(),
        ) else {
            return VIRTIO_BLK_S_IOERR;
        };
        let done = match kind {
            VIRTIO_BLK_T_IN => self.read(sector, writer),
            VIRTIO_BLK_T_OUT => self.write(sector, reader),
            VIRTIO_BLK_T_FLUSH => self.file.sync_data(),
            VIRTIO_BLK_T_GET_ID => writer.write_all(&b"reference\0\0\0\0\0\0\0\0\0\0\0"[..]),
            _ => return VIRTIO_BLK_S_UNSUPP,
        };
        if done.is_ok() {
            VIRTIO_BLK_S_OK
        } else {
            VIRTIO_BLK_S_IOERR
        }
    }

    /// The byte offset of a request that lies within the disk.
    fn offset(&self, sector: u64, length: usize) -> io::Result<u64> {
        let offset = sector.checked_mul(SECTOR);
        let end = offset.and_then(|offset| offset.checked_add(length as u64));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= self.file.metadata()?.len() && length <= MAX_DATA => {
                Ok(offset)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn read(&self, sector: u64, writer: &mut Writer<'_>) -> io::Result<()> {
        let length = writer.available_bytes();
        let offset = self.offset(sector, length)?;
        let mut data = vec![0; length];
        self.file.read_exact_at(&mut data, offset)?;
        writer.write_all(&data)
    }

    fn write(&self, sector: u64, reader: &mut Reader<'_>) -> io::Result<()> {
        let length = reader.available_bytes();
        let offset = self.offset(sector, length)?;
        let mut data = vec![0; length];
        io::Read::read_exact(reader, &mut data)?;
        self.file.write_all_at(&data, offset)
    }
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_FLUSH
            | PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    /// struct virtio_blk_config: the capacity, then zeros.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let sectors = self.file.metadata().map_or(0, |file| file.len() / SECTOR);
        let mut config = sectors.to_le_bytes().to_vec();
        config.resize(offset as usize + size as usize, 0);
        config.split_off(offset as usize)
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        events: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(queue)) else {
            return Ok(());
        };
        if events != EventSet::IN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            if self.event_idx {
                vring.disable_notification().map_err(io::Error::other)?;
            }
            self.serve(vring)?;
            if !self.event_idx || !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let (Some(socket), Some(path)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: reference-blk SOCKET RAW-FILE");
    };
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {path}"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let disk = Disk {
        file,
        memory: memory.clone(),
        event_idx: false,
    };
    let mut daemon = VhostUserDaemon::new("reference-blk".to_owned(), Arc::new(Mutex::new(disk)), memory)
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    daemon.serve(socket).map_err(|error| anyhow::anyhow!("{error}"))
}
