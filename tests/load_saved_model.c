/* Classifies image files with the TensorFlow C library, as TF Serving loads a model.

   load_saved_model VERSION_FOLDER FILE...

   Finds the names of the tensors of `serving_default` in the MetaGraphDef that
   TF_LoadSessionFromSavedModel returns; prints label, score and validity of each. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

typedef struct {
  const unsigned char *at, *end;
} Bytes;

static void fail(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static unsigned long long varint(Bytes *bytes) {
  unsigned long long value = 0;
  for (int shift = 0; bytes->at < bytes->end && shift < 64; shift += 7) {
    unsigned char byte = *bytes->at++;
    value |= (unsigned long long)(byte & 127) << shift;
    if (byte < 128) return value;
  }
  fail("a varint does not end");
  return 0;
}

/* Reads one field of a message; returns its number, 0 at the end. */
static int next_field(Bytes *message, Bytes *content) {
  if (message->at >= message->end) return 0;
  unsigned long long tag = varint(message), length = 0;
  switch (tag & 7) {
    case 0: varint(message); break;
    case 1: length = 8; break;
    case 2: length = varint(message); break;
    case 5: length = 4; break;
    default: fail("an unknown kind of field");
  }
  if (length > (unsigned long long)(message->end - message->at)) fail("cut short");
  content->at = message->at;
  content->end = message->at += length;
  return (int)(tag >> 3);
}

/* Returns the first field of that number, empty if there is none. */
static Bytes field(Bytes message, int number) {
  Bytes content;
  for (int found; (found = next_field(&message, &content));)
    if (found == number) return content;
  content.at = content.end = NULL;
  return content;
}

/* Looks up a key in a map field, which is a repeated message of key and value. */
static Bytes lookup(Bytes message, int number, const char *key) {
  Bytes entry;
  for (int found; (found = next_field(&message, &entry));) {
    if (found != number) continue;
    Bytes name = field(entry, 1);
    size_t length = (size_t)(name.end - name.at);
    if (length == strlen(key) && !memcmp(name.at, key, length)) return field(entry, 2);
  }
  fail(key);
  return entry;
}

static TF_Output tensor(TF_Graph *graph, Bytes signature, int map, const char *key) {
  Bytes name = field(lookup(signature, map, key), 1);
  char text[256];
  size_t length = (size_t)(name.end - name.at);
  if (length >= sizeof text) fail("a long name");
  memcpy(text, name.at, length);
  text[length] = 0;
  char *colon = strrchr(text, ':');
  if (!colon) fail("a name without a number");
  *colon = 0;
  TF_Output output = {TF_GraphOperationByName(graph, text), atoi(colon + 1)};
  if (!output.oper) fail("a tensor that is not in the graph");
  return output;
}

static void read_file(const char *path, TF_TString *string) {
  FILE *file = fopen(path, "rb");
  if (!file) fail(path);
  fseek(file, 0, SEEK_END);
  size_t size = (size_t)ftell(file);
  rewind(file);
  char *content = malloc(size + 1);
  if (fread(content, 1, size, file) != size) fail(path);
  fclose(file);
  TF_StringInit(string);
  TF_StringCopy(string, content, size);
  free(content);
}

int main(int count, char **arguments) {
  if (count < 2) fail("usage: load_saved_model VERSION_FOLDER FILE...");
  const char *tags[] = {"serve"};
  TF_Status *status = TF_NewStatus();
  TF_Graph *graph = TF_NewGraph();
  TF_Buffer *meta = TF_NewBuffer();
  TF_SessionOptions *options = TF_NewSessionOptions();
  TF_Session *session = TF_LoadSessionFromSavedModel(options, NULL, arguments[1], tags,
                                                     1, graph, meta, status);
  if (TF_GetCode(status) != TF_OK) fail(TF_Message(status));
  Bytes graph_def = {meta->data, (const unsigned char *)meta->data + meta->length};
  Bytes signature = lookup(graph_def, 5, "serving_default");

  long long images = count - 2;
  TF_Output input = tensor(graph, signature, 1, "image_bytes");
  TF_Tensor *encoded = TF_AllocateTensor(TF_STRING, &images, 1,
                                         (size_t)images * sizeof(TF_TString));
  for (int i = 0; i < images; i++)
    read_file(arguments[2 + i], (TF_TString *)TF_TensorData(encoded) + i);

  TF_Output outputs[] = {tensor(graph, signature, 2, "label"),
                         tensor(graph, signature, 2, "score"),
                         tensor(graph, signature, 2, "valid")};
  TF_Tensor *results[3];
  TF_SessionRun(session, NULL, &input, &encoded, 1, outputs, results, 3, NULL, 0, NULL,
                status);
  if (TF_GetCode(status) != TF_OK) fail(TF_Message(status));
  for (int i = 0; i < images; i++) {
    TF_TString *label = (TF_TString *)TF_TensorData(results[0]) + i;
    float score = ((float *)TF_TensorData(results[1]))[i];
    int valid = ((unsigned char *)TF_TensorData(results[2]))[i];
    printf("%.*s\t%.6f\t%d\n", (int)TF_StringGetSize(label),
           TF_StringGetDataPointer(label), score, valid);
  }
  return 0;
}
