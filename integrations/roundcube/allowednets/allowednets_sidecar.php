<?php

/** What the sidecar says. Only Allow lets anybody in. */
enum allowednets_answer
{
    case Allow;
    case Deny;
    /** The name is none that a mailbox can have. */
    case NoMailbox;
    /** There is no answer, or none that can be relied on. */
    case None;
}

/** Why there is no answer. The message holds nothing that a client has sent. */
final class allowednets_no_answer extends RuntimeException
{
    /**
     * @param bool $passing Whether it may be over in a moment
     */
    public function __construct(string $message, public readonly bool $passing = false)
    {
        parent::__construct($message);
    }
}

/**
 * The sidecar on this machine: POST /v1/check of docs/semantics.md, over HTTP.
 */
final class allowednets_sidecar
{
    /** Bounds everything, retries included. */
    private const TOTAL_MILLISECONDS = 500;
    private const PAUSE_MILLISECONDS = 25;
    private const MAX_NAME_OCTETS = 1024;
    private const MAX_ANSWER_OCTETS = 16384;

    /**
     * @param string $where http://127.0.0.1:PORT, http://[::1]:PORT or unix:PATH
     * @param string $token Bearer token; empty: none
     */
    public function __construct(private string $where, private string $token)
    {
    }

    /**
     * Asks whether a browser at an address may use a mailbox.
     *
     * @param string $name    Login name or mailbox, in any spelling
     * @param string $address Empty if it is unknown
     *
     * @throws allowednets_no_answer
     */
    public function ask(string $name, string $address): allowednets_answer
    {
        if (strlen($name) > self::MAX_NAME_OCTETS || !mb_check_encoding($name, 'UTF-8')) {
            return allowednets_answer::NoMailbox;
        }
        $question = json_encode(
            ['mailbox' => $name, 'clientAddress' => $address, 'service' => 'SERVICE_WEBMAIL'],
            JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE
        );
        $end = hrtime(true) + self::TOTAL_MILLISECONDS * 1_000_000;
        while (true) {
            try {
                return $this->post($question, intdiv($end - hrtime(true), 1_000_000));
            } catch (allowednets_no_answer $e) {
                if (!$e->passing || hrtime(true) + self::PAUSE_MILLISECONDS * 1_000_000 >= $end) {
                    throw $e;
                }
                usleep(self::PAUSE_MILLISECONDS * 1000);
            }
        }
    }

    private function post(string $question, int $milliseconds): allowednets_answer
    {
        if (!extension_loaded('curl')) {
            throw new allowednets_no_answer('PHP lacks the extension curl (Debian: php-curl)');
        }
        $handle = curl_init();
        if (preg_match('#^unix:(/.+)$#', $this->where, $m)) {
            curl_setopt($handle, CURLOPT_UNIX_SOCKET_PATH, $m[1]);
            $url = 'http://localhost';
        } elseif (preg_match('#^http://(127\.\d+\.\d+\.\d+|\[::1\]):\d+$#', $this->where)) {
            $url = $this->where;
        } else {
            throw new allowednets_no_answer(
                'allowednets_sidecar is neither http://127.0.0.1:PORT, http://[::1]:PORT nor unix:PATH'
            );
        }
        $headers = ['Content-Type: application/json', 'Expect:'];
        if ($this->token !== '') {
            $headers[] = 'Authorization: Bearer ' . $this->token;
        }
        $body = '';
        curl_setopt_array($handle, [
            CURLOPT_URL => $url . '/v1/check',
            CURLOPT_POSTFIELDS => $question,
            CURLOPT_HTTPHEADER => $headers,
            CURLOPT_TIMEOUT_MS => max(1, $milliseconds), // 0 would be for ever
            CURLOPT_NOSIGNAL => true,
            CURLOPT_PROXY => '', // whatever the environment says
            CURLOPT_PROTOCOLS => CURLPROTO_HTTP,
            CURLOPT_FOLLOWLOCATION => false,
            CURLOPT_WRITEFUNCTION => static function ($_, string $part) use (&$body): int {
                $body .= $part;
                return strlen($body) > self::MAX_ANSWER_OCTETS ? -1 : strlen($part);
            },
        ]);
        if (!curl_exec($handle)) {
            // A sidecar that restarts refuses connections, or breaks them.
            $passing = in_array(curl_errno($handle), [CURLE_COULDNT_CONNECT, CURLE_GOT_NOTHING, CURLE_RECV_ERROR, CURLE_SEND_ERROR], true);
            throw new allowednets_no_answer($this->where . ': ' . curl_strerror(curl_errno($handle)), $passing);
        }
        $status = curl_getinfo($handle, CURLINFO_RESPONSE_CODE);
        $type = (string) curl_getinfo($handle, CURLINFO_CONTENT_TYPE);
        if (!preg_match('#^application/json\s*(;|$)#i', $type)) {
            throw new allowednets_no_answer($this->where . " answers $status without JSON: is it the sidecar?");
        }
        return $this->read($status, json_decode($body, true, 16));
    }

    private function read(int $status, mixed $answer): allowednets_answer
    {
        if ($status === 400 && is_array($answer) && self::has_reason($answer, 'MAILBOX_INVALID')) {
            return allowednets_answer::NoMailbox;
        }
        if ($status !== 200) {
            throw new allowednets_no_answer($this->where . " answers $status", $status === 503); // 503: it knows nothing yet
        }
        $decision = is_array($answer) ? $answer['decision'] ?? null : null;
        if (!is_array($decision) || !is_string($decision['revision'] ?? null) || $decision['revision'] === '') {
            throw new allowednets_no_answer($this->where . ' answers what is no decision');
        }
        return match ([$decision['verdict'] ?? null, $decision['reason'] ?? null]) {
            ['VERDICT_ALLOW', 'REASON_UNRESTRICTED'], ['VERDICT_ALLOW', 'REASON_MATCHED'] => allowednets_answer::Allow,
            ['VERDICT_DENY', 'REASON_NOT_IN_ALLOWED_NETS'], ['VERDICT_DENY', 'REASON_CLIENT_ADDRESS_UNKNOWN'],
            ['VERDICT_DENY', 'REASON_CLIENT_ADDRESS_NOT_PUBLIC'] => allowednets_answer::Deny,
            ['VERDICT_DENY', 'REASON_STALE'] => throw new allowednets_no_answer("the sidecar's data is too old (--deny-after)"),
            default => throw new allowednets_no_answer($this->where . ' answers what is no decision about webmail'),
        };
    }

    /** Whether a google.rpc.Status has an ErrorInfo with a reason. */
    private static function has_reason(array $status, string $reason): bool
    {
        foreach (is_array($status['details'] ?? null) ? $status['details'] : [] as $detail) {
            if (is_array($detail) && ($detail['domain'] ?? '') === 'allowednets' && ($detail['reason'] ?? '') === $reason) {
                return true;
            }
        }
        return false;
    }
}
